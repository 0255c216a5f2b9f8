"""The workload: Causal-DER and its relatives, class-incremental learning by replay (`python -m trainers`)."""
