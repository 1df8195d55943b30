"""What is known of a text: its characters, words, sentences, repetitions."""
