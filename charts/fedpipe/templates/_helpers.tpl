{{- define "fedpipe.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* Labels by which Pods of a component are selected: dict "root" . "component" "operator" */ -}}
{{- define "fedpipe.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "fedpipe.labels" -}}
{{ include "fedpipe.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end -}}

{{- /* dict "root" . "image" .Values.operator.image */ -}}
{{- define "fedpipe.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "fedpipe.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* Pod Security "restricted" */ -}}
{{- define "fedpipe.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "fedpipe.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "fedpipe.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- /* Where probes find the coordinator: the URL that the operator gives its agents */ -}}
{{- define "fedpipe.coordinator" -}}
{{- $service := printf "https://%s.%s.svc:8443" (include "fedpipe.fullname" .) .Release.Namespace -}}
{{- .Values.operator.coordinatorURL | default $service -}}
{{- end -}}

{{- /* ConfigMap with the operator's CA, for probes that measure the link and for Prometheus */ -}}
{{- define "fedpipe.operatorCA" -}}
{{- include "fedpipe.fullname" . }}-operator-ca
{{- end -}}

{{- /* Peers that may reach the ports of metrics, as a list; empty: nobody */ -}}
{{- define "fedpipe.metricsPeers" -}}
{{- $peers := .Values.networkPolicy.metricsFrom }}
{{- $namespaces := list }}
{{- range .Values.metrics.readers }}
{{- $namespaces = append $namespaces .namespace }}
{{- end }}
{{- range $namespaces | uniq }}
{{- $peers = append $peers (dict "namespaceSelector" (dict "matchLabels" (dict "kubernetes.io/metadata.name" .))) }}
{{- end }}
{{- toYaml $peers }}
{{- end -}}

{{- define "fedpipe.claim" -}}
{{- .Values.persistence.existingClaim | default (printf "%s-store" (include "fedpipe.fullname" .)) -}}
{{- end -}}
