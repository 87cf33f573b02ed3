"""Stable Diffusion 1.x, 2.x and XL: CLIP text encoders and a U-Net."""
