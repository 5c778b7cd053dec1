"""What a projector is trained towards: terms, where they are read, and the teacher that some of them compare with."""
