"""Embedded data: Split Fashion-MNIST mini, its licence, its digest and the script that made it."""
