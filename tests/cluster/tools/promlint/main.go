// promlint reads metrics in Prometheus' text format from standard input, and exits with 1 where they break its rules.
package main

import (
	"fmt"
	"os"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

func main() {
	problems, err := promlint.New(os.Stdin).Lint()
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for _, problem := range problems {
		fmt.Println(problem.Metric + ": " + problem.Text)
	}
	if len(problems) > 0 {
		os.Exit(1)
	}
}
