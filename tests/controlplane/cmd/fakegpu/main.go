// Command fakegpu is a device plugin that offers the kubelet devices which don't exist: one for each argument.
package main

import (
	"context"
	"log"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const endpoint = "fakegpu.sock"

type plugin struct {
	api.UnimplementedDevicePluginServer
	uuids []string
}

func (p plugin) GetDevicePluginOptions(context.Context, *api.Empty) (*api.DevicePluginOptions, error) {
	return &api.DevicePluginOptions{}, nil
}

func (p plugin) ListAndWatch(_ *api.Empty, stream api.DevicePlugin_ListAndWatchServer) error {
	devices := make([]*api.Device, len(p.uuids))
	for i, uuid := range p.uuids {
		devices[i] = &api.Device{ID: uuid, Health: api.Healthy}
	}
	if err := stream.Send(&api.ListAndWatchResponse{Devices: devices}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

func (p plugin) Allocate(_ context.Context, request *api.AllocateRequest) (*api.AllocateResponse, error) {
	response := &api.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		visible := map[string]string{"NVIDIA_VISIBLE_DEVICES": strings.Join(container.DevicesIds, ",")}
		response.ContainerResponses = append(response.ContainerResponses, &api.ContainerAllocateResponse{Envs: visible})
	}
	return response, nil
}

func main() {
	own := api.DevicePluginPath + endpoint
	_ = os.Remove(own)
	listener, err := net.Listen("unix", own)
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer()
	api.RegisterDevicePluginServer(server, plugin{uuids: os.Args[1:]})
	go func() { log.Fatal(server.Serve(listener)) }()
	kubelet, err := grpc.NewClient("unix://"+api.KubeletSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	register := &api.RegisterRequest{Version: api.Version, Endpoint: endpoint, ResourceName: "nvidia.com/gpu"}
	if _, err := api.NewRegistrationClient(kubelet).Register(ctx, register); err != nil {
		log.Fatal(err)
	}
	log.Print("registered")
	select {}
}
