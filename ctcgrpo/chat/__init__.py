"""`ctcgrpo chat`: a person plays the policy's role against the simulated user, or is the user and talks with a policy."""
