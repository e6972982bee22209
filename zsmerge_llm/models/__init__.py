"""Where models come from: names, the Hub, folders and GGUF files; devices and dtypes."""
