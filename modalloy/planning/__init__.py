"""What a merge will do, from headers only: jobs, their costs, and the fate of every tensor."""
