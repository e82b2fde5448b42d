"""The state of a training run: objective, optimizer, averages, directory."""
