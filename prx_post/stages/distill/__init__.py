"""`prx-post distill`: few-step students by trajectory regression, LADD or DMD2."""
