"""What children of the forkserver find imported: everything a stage imports on its way, none of it started."""
