"""One thin file a stage: read parameters, call bnncore, write outputs."""
