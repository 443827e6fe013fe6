"""Networks, their parameterisation and published draws, and what scripts need to know of each rule."""
