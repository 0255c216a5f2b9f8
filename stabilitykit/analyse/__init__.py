"""Tables to findings: drift, headroom, spikes, comparisons of runs."""
