"""The op pack_points: x and the attack's input gradient in, the packed batch out."""
