"""What setup.py builds with: `find` looks for torch and compilers, `parts` says what is compiled from what and how."""
