"""How networks are trained, in one process: jobs, the loop, schemes. No Ray, no MLflow."""
