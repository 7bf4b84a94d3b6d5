"""Pure maths on images: spectra, filters, augmentation. No Flax, no config, no state."""
