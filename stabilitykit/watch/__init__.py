"""What a live run gives away: module hooks, gradient norms, parameters, the replay buffer."""
