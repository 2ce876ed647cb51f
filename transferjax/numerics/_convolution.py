from jax.lax import conv_general_dilated
