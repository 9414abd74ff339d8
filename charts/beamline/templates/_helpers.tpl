{{- define "beamline.name" -}}
{{- .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "beamline.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}
{{- .Release.Name | trunc 53 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 53 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "beamline.selectorLabels" -}}
app.kubernetes.io/name: {{ include "beamline.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "beamline.labels" -}}
{{ include "beamline.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: beamline
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "beamline.externalMetrics" -}}
{{- printf "%s-external-metrics" (include "beamline.fullname" . | trunc 46 | trimSuffix "-") }}
{{- end }}

{{- define "beamline.queues" -}}
{{- printf "%s-queues" (include "beamline.fullname" .) }}
{{- end }}

{{- /* In the namespace `default`, where releases of several namespaces have one each. */}}
{{- define "beamline.apiServer" -}}
{{- printf "%s-%s-api-server" (include "beamline.fullname" .) .Release.Namespace }}
{{- end }}

{{- define "beamline.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "beamline.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name is needed when serviceAccount.create is false" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "beamline.image" -}}
{{- with .Values.image.digest }}
{{- printf "%s@%s" $.Values.image.repository . }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{- define "beamline.testLabels" -}}
{{ include "beamline.selectorLabels" . | replace "component: operator" "component: test" }}
{{- end }}

{{- /* All but cloud metadata and what else belongs to a node alone. */}}
{{- define "beamline.anybody" -}}
- ipBlock: {cidr: 0.0.0.0/0, except: [169.254.0.0/16]}
- ipBlock: {cidr: "::/0", except: ["fe80::/10"]}
{{- end }}

{{- /* The port of a URL. */}}
{{- define "beamline.portOf" -}}
{{- $url := urlParse . }}
{{- regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (ternary "443" "80" (eq $url.scheme "https")) }}
{{- end }}

{{- define "beamline.subjects" -}}
- kind: ServiceAccount
  name: {{ include "beamline.serviceAccountName" . }}
  namespace: {{ .Release.Namespace }}
{{- end }}

{{- define "beamline.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "beamline.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
