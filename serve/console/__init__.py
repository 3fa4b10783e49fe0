"""The console: pages over the files of a mount. It reads, asks a run to stop, and keeps a curator's decisions."""
