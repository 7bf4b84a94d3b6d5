"""The training step and the loop that joins the rooms."""
