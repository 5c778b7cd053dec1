"""What methods keep of images and why: measures per image, figures and tables. One file for each analysis."""
