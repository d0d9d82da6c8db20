"""The convolutional VAE, the attention U-Net, their losses and the bundle they are shipped in."""
