"""The measures of models on data: accuracies, losses, written answers, agreement with the base."""
