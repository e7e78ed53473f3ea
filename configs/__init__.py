"""The shipped configs, so that an installed package has them."""
