"""The tables and figures of the two papers, beside ours.

``python -m bnncore.storage --papers`` prints the storage figures (`sizes`): they need no training
and have to be equal. ``python -m bnncore.paper RESULTS_DIR ...`` collects finished runs (`runs`)
and writes the papers' tables and plots with their accuracies (`report`, `plots`): published value,
ours, difference, epochs, seeds. What has not been run stays blank. What the papers print is data,
`figures.yaml`, read by `figures`.

Papers: TentacleNet (2020); Kim, Alnemari and Bagherzadeh, "A storage-efficient ensemble
classification using filter sharing on binarized convolutional neural networks" (2022).

Legend: `M` members.
"""
