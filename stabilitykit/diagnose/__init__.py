"""The replayed step, op by op: trace, walk to the origin, cause and remedy."""
