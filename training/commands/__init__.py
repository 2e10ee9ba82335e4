"""What the commands that train and evaluate show."""
