"""The wing that learns labels: train, evaluate, predict, report."""
