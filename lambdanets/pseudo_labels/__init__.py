"""Semi-supervised learning: a teacher labels pictures, the least doubtful are selected, a student learns from both."""
