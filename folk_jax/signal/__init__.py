"""Pure maths on images: spectra, filters and augmentation. Arrays in, arrays out; no Flax, no
config, no state."""
