"""The model server and the console on port 5000: `bash serve/serve.sh`."""
