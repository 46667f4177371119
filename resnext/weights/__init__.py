"""Reading trained weights of this and other programs."""
