"""What makes data sets: `prx-post data`, a recipe each."""
