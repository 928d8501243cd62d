"""Labels out of annotation tools as masks of class ids, and masks back into tools as outlines to correct."""
