"""The int4 store on disk, and where tensors wait: on the device, in host memory, or in a file."""
