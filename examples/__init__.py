"""What can be built on the model; each file is a whole program."""
