"""The op elle_loss: logits of the packed batch in, loss and E_lin out."""
