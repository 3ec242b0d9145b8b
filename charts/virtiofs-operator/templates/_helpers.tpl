{{/* The image of all programs. */}}
{{- define "virtiofs.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* Labels of what a program consists of; dict "root" . "name" NAME. */}}
{{- define "virtiofs.labels" -}}
{{ include "virtiofs.selector" . }}
app.kubernetes.io/part-of: virtiofs-operator
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{/* By which its pods are found. */}}
{{- define "virtiofs.selector" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end }}

{{/* What every pod says of its image. */}}
{{- define "virtiofs.container-image" -}}
image: {{ include "virtiofs.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{/* Pods of every node: as important as what nodes are made of, wherever they may run. */}}
{{- define "virtiofs.on-every-node" -}}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
tolerations:
  - operator: Exists
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Pods that belong to no node. */}}
{{- define "virtiofs.operator-placement" -}}
{{- with .Values.operator.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.operator.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.operator.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The node's directories, as options of agent and broker. */}}
{{- define "virtiofs.directories" -}}
- --runtime-dir=/run/virtiofs
- --kubelet-dir={{ .Values.kubeletDir }}
- --source-root=/host
{{- range .Values.allowedSources }}
- --allowed-source={{ . }}
{{- end }}
{{- end }}

{{/* Where the host's directories are in a container; dict "root" . "readOnly" BOOL. */}}
{{- define "virtiofs.source-mounts" -}}
{{- $readOnly := .readOnly }}
{{- range $i, $path := .root.Values.allowedSources }}
- name: source-{{ $i }}
  mountPath: /host{{ $path }}
  readOnly: {{ $readOnly }}
  # Later mounts and unmounts of the host below it are visible inside.
  mountPropagation: HostToContainer
{{- end }}
{{- end }}

{{- define "virtiofs.source-volumes" -}}
{{- range $i, $path := .Values.allowedSources }}
- name: source-{{ $i }}
  hostPath:
    path: {{ $path }}
    type: DirectoryOrCreate
{{- end }}
{{- end }}
