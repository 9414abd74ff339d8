// schemas writes JSON schemas that know every field and allow no other, for kubeconform, which would else download them.
//
// usage: schemas DIRECTORY SWAGGER CRD…
//
// SWAGGER is the API as a release of Kubernetes publishes it; a CRD is a CustomResourceDefinition in YAML. Each kind
// becomes DIRECTORY/<group>/<kind>_<version>.json, with "v1" for the group without a name, as kubeconform calls it.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"sigs.k8s.io/yaml"
)

type object = map[string]any

const definitions = "#/definitions/"

func main() {
	if err := write(os.Args[1], os.Args[2], os.Args[3:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func write(directory, swagger string, crds []string) error {
	if err := writeBuiltIn(directory, swagger); err != nil {
		return err
	}
	for _, crd := range crds {
		if err := writeCustom(directory, crd); err != nil {
			return err
		}
	}
	return nil
}

func writeBuiltIn(directory, swagger string) error {
	var api struct{ Definitions map[string]object }
	if err := read(swagger, &api); err != nil {
		return err
	}
	for _, definition := range api.Definitions {
		tighten(definition)
	}
	// Published as a string; `cpu: 1` is as good.
	api.Definitions["io.k8s.apimachinery.pkg.api.resource.Quantity"]["type"] = []any{"string", "number"}
	for name, definition := range api.Definitions {
		kinds, _ := definition["x-kubernetes-group-version-kind"].([]any)
		// What stands for many kinds, such as DeleteOptions, is nothing that a manifest holds.
		if len(kinds) != 1 {
			continue
		}
		kind := kinds[0].(object)
		used := object{}
		collect(definition, api.Definitions, used)
		schema := object{"$ref": definitions + name, "definitions": used}
		used[name] = definition
		if err := save(directory, kind["group"].(string), kind["kind"].(string), kind["version"].(string), schema); err != nil {
			return err
		}
	}
	return nil
}

func writeCustom(directory, path string) error {
	var crd struct {
		Spec struct {
			Group    string
			Names    struct{ Kind string }
			Versions []struct {
				Name   string
				Schema struct{ OpenAPIV3Schema object }
			}
		}
	}
	if err := read(path, &crd); err != nil {
		return err
	}
	for _, version := range crd.Spec.Versions {
		tighten(version.Schema.OpenAPIV3Schema)
		if err := save(directory, crd.Spec.Group, crd.Spec.Names.Kind, version.Name, version.Schema.OpenAPIV3Schema); err != nil {
			return err
		}
	}
	return nil
}

// tighten lets an object have the properties that are listed and no other, and drops what only people read.
func tighten(schema any) {
	switch schema := schema.(type) {
	case []any:
		for _, part := range schema {
			tighten(part)
		}
	case object:
		if properties, ok := schema["properties"].(object); ok {
			for _, property := range properties {
				tighten(property)
			}
			_, more := schema["additionalProperties"]
			if !more && schema["x-kubernetes-preserve-unknown-fields"] != true {
				schema["additionalProperties"] = false
			}
		}
		for _, key := range []string{"items", "additionalProperties", "anyOf", "oneOf", "allOf"} {
			tighten(schema[key])
		}
		if _, isText := schema["description"].(string); isText {
			delete(schema, "description")
		}
		// What the published API calls a string may also be written as a number.
		if schema["format"] == "int-or-string" {
			delete(schema, "format")
			schema["type"] = []any{"string", "integer"}
		}
	}
}

// collect adds to used every definition that the schema refers to.
func collect(schema any, all map[string]object, used object) {
	switch schema := schema.(type) {
	case []any:
		for _, part := range schema {
			collect(part, all, used)
		}
	case object:
		if reference, ok := schema["$ref"].(string); ok {
			name := strings.TrimPrefix(reference, definitions)
			if _, seen := used[name]; !seen {
				used[name] = all[name]
				collect(all[name], all, used)
			}
		}
		for _, part := range schema {
			collect(part, all, used)
		}
	}
}

func read(path string, into any) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return yaml.Unmarshal(content, into)
}

func save(directory, group, kind, version string, schema object) error {
	if group == "" {
		group = version
	}
	path := filepath.Join(directory, group, strings.ToLower(kind)+"_"+version+".json")
	content, err := json.Marshal(schema)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, content, 0o644)
}
