"""What makes parts of the project, and is not part of the package."""
