{{- define "gogrid.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- /* Short enough that every suffix the chart adds stays below 63 characters. */ -}}
{{- define "gogrid.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "gogrid.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "gogrid.operator" -}}{{ include "gogrid.fullname" . }}-operator{{- end -}}
{{- define "gogrid.agent" -}}{{ include "gogrid.fullname" . }}-agent{{- end -}}

{{- /* The names admission sees. They must be the rendered ones, or a policy silently never matches. */ -}}
{{- define "gogrid.operatorUser" -}}system:serviceaccount:{{ .Release.Namespace }}:{{ include "gogrid.operator" . }}{{- end -}}
{{- define "gogrid.agentUser" -}}system:serviceaccount:{{ .Release.Namespace }}:{{ include "gogrid.agent" . }}{{- end -}}

{{- define "gogrid.priorityClass" -}}
{{- if .Values.priorityClass.name -}}{{ .Values.priorityClass.name }}{{- else -}}{{ include "gogrid.fullname" . }}-guest{{- end -}}
{{- end -}}

{{- define "gogrid.selector" -}}
app.kubernetes.io/name: {{ include "gogrid.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "gogrid.labels" -}}
{{ include "gogrid.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{- /* (dict "root" $ "image" .Values.agent.image) */ -}}
{{- define "gogrid.image" -}}
{{- $registry := (.root.Values.global).imageRegistry | default "" -}}
{{- if $registry }}{{ $registry }}/{{ end }}{{ .image.repository -}}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ .image.tag | default .root.Chart.AppVersion }}{{ end -}}
{{- end -}}

{{- define "gogrid.pullSecrets" -}}
{{- with (.Values.global).imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{- /* The first is in the agent's image: a demo model, so that a first job needs no file on any node. */ -}}
{{- define "gogrid.modelRootArgs" -}}
- --model-root=/usr/share/gogrid/models
{{- range .Values.modelRoots }}
- --model-root={{ . }}
{{- end }}
{{- end -}}

{{- /* Who may scrape; none named = every pod. */ -}}
{{- define "gogrid.scrapers" -}}
{{- with .Values.networkPolicy.metricsFrom -}}
from:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}

{{- /* The plain agent keeps off nodes that have a flavour. */ -}}
{{- define "gogrid.agentAffinity" -}}
{{- $values := .root.Values.agent -}}
{{- $affinity := deepCopy $values.affinity -}}
{{- if hasKey $values.flavours "default" -}}
{{- fail "agent.flavours: no flavour may be called default: that is the plain agent" -}}
{{- end -}}
{{- if and $values.flavours $affinity.nodeAffinity -}}
{{- fail "agent.affinity.nodeAffinity can't be used together with agent.flavours: choose nodes by agent.nodeSelector" -}}
{{- end -}}
{{- if and $values.flavours (eq .name "default") -}}
{{- $other := dict "key" "gogrid.dev/flavour" "operator" "NotIn" "values" (keys $values.flavours | sortAlpha) -}}
{{- $terms := dict "nodeSelectorTerms" (list (dict "matchExpressions" (list $other))) -}}
{{- $_ := set $affinity "nodeAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" $terms) -}}
{{- end -}}
{{- with $affinity }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{- /* The workers' image of a flavour: another repository shares no digest with the plain one. */ -}}
{{- define "gogrid.workersImage" -}}
{{- $image := deepCopy .root.Values.workers.image -}}
{{- with (.flavour.workers).image -}}
{{- if .repository }}{{ $image = set (set $image "repository" .repository) "digest" "" }}{{ end -}}
{{- if .tag }}{{ $image = set (set $image "tag" .tag) "digest" "" }}{{ end -}}
{{- if .digest }}{{ $image = set $image "digest" .digest }}{{ end -}}
{{- end -}}
{{- include "gogrid.image" (dict "root" .root "image" $image) -}}
{{- end -}}
