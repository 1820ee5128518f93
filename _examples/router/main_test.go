package main

// What it prints on the embedded server. The end of main is the end of the test: it exits when something is lost.
func Example() {
	main()
	// Output:
	// fine       delivery 1: ok
	// flaky      delivery 1: the tax service does not answer
	// flaky      delivery 2: the tax service does not answer
	// flaky      delivery 3: ok
	// panicking  delivery 1: panic occurred: "a bug"
	// panicking  delivery 2: ok
	// hopeless   delivery 1: the customer has no address
	// hopeless   delivery 2: the customer has no address
	// hopeless   delivery 3: the customer has no address -> dead
	// unknown    delivery 1: no such customer -> dead
	// invalid    delivery 1: line 1: the quantity is negative -> dead
	// early      delivery 1: the office is closed
	// early      delivery 1: ok
	//
	// Invoices:
	//   invoice for fine
	//   invoice for flaky
	//   invoice for panicking
	//   invoice for early
	// Dead letters:
	//   hopeless: exhausted, deliveries: 3, the customer has no address
	//   invalid: filtered, deliveries: 1, line 1: the quantity is negative
	//   no message: broken, deliveries: 1, fields ["by" "hand"]
	//   unknown: permanent, deliveries: 1, no such customer
}
