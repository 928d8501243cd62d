"""What is chosen for people's own data: from the images and the machine, each choice with its reason."""
