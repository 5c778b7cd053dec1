"""What methods keep of images, drawn: states of tokens, pictures as the tower saw them, answers, figures and a page."""
