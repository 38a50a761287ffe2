"""What lies in the folder of a run: record, weights, checkpoints, log."""
