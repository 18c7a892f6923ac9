"""Int4 layers inside transformers, PEFT and bitsandbytes. Each library is imported only when it is used."""
