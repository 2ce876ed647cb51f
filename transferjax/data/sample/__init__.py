"""The bundled sample of Fashion-MNIST, prepared by a TFDS builder."""
