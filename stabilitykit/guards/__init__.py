"""The stability guards as parts for any training loop."""
