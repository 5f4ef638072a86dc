// Empty: nothing is compiled with the toolkit here.
