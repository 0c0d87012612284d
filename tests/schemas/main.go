// schemas reads JSON objects, one a line, and says which of them Kubernetes of the minor version that it was built with does
// not know, or knows differently: the API types decode strictly, so an unknown or misspelt field is an error.
package main

import (
	"bufio"
	"fmt"
	"os"

	admissionregistration "k8s.io/api/admissionregistration/v1"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	flowcontrol "k8s.io/api/flowcontrol/v1"
	networking "k8s.io/api/networking/v1"
	policy "k8s.io/api/policy/v1"
	rbac "k8s.io/api/rbac/v1"
	scheduling "k8s.io/api/scheduling/v1"
	apiextensions "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
)

func main() {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		admissionregistration.AddToScheme, apps.AddToScheme, core.AddToScheme, flowcontrol.AddToScheme,
		networking.AddToScheme, policy.AddToScheme, rbac.AddToScheme, scheduling.AddToScheme, apiextensions.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	lines, failed := bufio.NewScanner(os.Stdin), false
	lines.Buffer(nil, 16<<20)
	read := 0
	for ; lines.Scan(); read++ {
		if _, kind, err := decoder.Decode(lines.Bytes(), nil, nil); err != nil {
			fmt.Printf("object %d (%v): %v\n", read, kind, err)
			failed = true
		}
	}
	if err := lines.Err(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	fmt.Printf("%d objects\n", read)
	if failed {
		os.Exit(1)
	}
}
